"""Measures both engines from outside, through their command lines and public APIs, and writes down what was found.

`schema` and `result_files` are the form of every result file; `demo` and `quality` are what a user runs; `cli` is the
`rowint8` command.
Nothing imports this package.
"""
