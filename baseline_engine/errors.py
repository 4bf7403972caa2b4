"""The exceptions that are meant for people."""


class EngineError(ValueError):
    """Something the user can put right. The message is one line: what was given, what is accepted, what to do."""


class SettingError(EngineError):
    """A setting (a sampling parameter, an engine option) outside what is accepted."""
