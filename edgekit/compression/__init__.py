"""Methods that change a network's weights: torch only, workstation only (docs/compression.md).

`edgekit.compress` and `edgekit compress` run a recipe (recipe.py): ordered steps, each a method of `methods/`, over a
`Problem` (problem.py: network, data, loss, metric) in a `Work` (work.py: what steps share and how they train).
"""
