"""LiteRT (the successor of TensorFlow Lite): `.tflite` files on CPUs and phones, kernels by XNNPACK."""
