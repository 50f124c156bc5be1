"""Quantization: one calibration, ranges from histograms, placement per target, repairs, search under a budget.

A quantized network is an ordinary `onnx_ir` model whose values carry `QuantParams` (see `annotate`);
what has none stays float. The backends turn these facts into Q/DQ nodes or integer tensors.
"""
