"""One compression method a file. Each has

    Options                                  # a frozen dataclass: its keys in a recipe's [[step]], all with defaults
    def run(work: Work, options: Options) -> None     # changes work.model, or what later trainings do
    LENGTHS = ("steps",)                              # options that count batches, where these are others

and docs: what it does, when it pays, the paper. The file's name is the method's name in recipes (`-` for `_`).
"""
