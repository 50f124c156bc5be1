"""Plan folders: networks with kernels between them, built into one bundle.

files.py       the folder as written: plan.json, strict
source.py      read and prepared once: graphs, the shape of every tensor, weights of kernels
running.py     payloads put together: a manifest, and a session of it on this machine
moments.py     what it is calibrated and judged on: moments of a rig
quantize.py    int8, segment by segment, within the error of the whole plan and the budget of its task
prove.py       evidence, golden values, samples
build.py       the main path: read it first
"""
