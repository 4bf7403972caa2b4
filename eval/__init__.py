"""Measures both engines from outside, through their command lines and public APIs, and writes down what was found.

The rooms, lowest first. Each imports only those before it:

    results    the form of every result file, and how it is read and written
    quantize   checkpoints with INT8 weights
    kernels    operators alone: times, tuning
    engines    whole engines: times, memory, where a step's time goes
    quality    what INT8 weights change in a model's answers
    report     results as tables, plots and documents
    cli        the command `rowint8`

Beside them: `demo` is the main job on a real model, `matrix` what is measured for a release, `models` the geometry of
what is measured, `processes` how other programs run. Nothing imports this package.
"""
