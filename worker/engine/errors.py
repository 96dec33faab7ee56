"""What an engine may fail with. No torch here: who handles a job needs none."""


class EngineError(Exception):
    """This engine cannot be had here; the message says why and what would have to change."""


class EngineLost(Exception):
    """A call could not be finished, and no later one can be: the worker has to be started anew."""


class OutOfMemory(Exception):
    """A call needed more memory than there is. Later ones may have enough; the engine is as it was."""
