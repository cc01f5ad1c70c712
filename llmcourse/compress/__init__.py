"""Smaller models: quantization, distillation, pruning.

`formats` are the numbers themselves; `quantize` is rounding to them; `calibrate`, `gptq`, `awq` and their
neighbours choose better; `quantized_linear` runs a model whose layers are stored so.
"""
