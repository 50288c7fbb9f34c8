from collections.abc import Callable

__version__: str

class FormatError(ValueError): ...

# Jobs. `config` is a JSON object with every setting of the Python function of the same name.
#
# `on_event` receives one JSON object a call, told apart by its key "event": data, model, step,
# eval, checkpoint, warning or stop. It returns True to go on and False to stop after this step,
# which writes a checkpoint as Ctrl-C does. An exception it raises ends the job and is raised here.
# KeyboardInterrupt is raised after the checkpoint is written.

def train(config: str, on_event: Callable[[str], bool]) -> str: ...
def evaluate(config: str, on_event: Callable[[str], bool]) -> str: ...
def generate(config: str, on_text: Callable[[str], bool] | None) -> str: ...
def merge(config: str) -> str: ...
