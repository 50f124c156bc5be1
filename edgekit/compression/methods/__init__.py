"""One compression method a file. Each has

    Options                                  # a frozen dataclass: its keys in a recipe's [[step]], all with defaults
    def run(work: Work, options: Options) -> None     # changes work.model, or what later trainings do
    def needs_target(options: Options) -> bool        # optional: whether it cannot run without a board

Options that count the batches of a training are called `steps` or `..._steps` (`edgekit compress --steps-scale`).
And docs: what it does, when it pays, the paper. The file's name is the method's name in recipes (`-` for `_`).
"""
