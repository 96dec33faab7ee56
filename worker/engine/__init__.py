"""What runs transformer and decoder: PyTorch, onnxruntime or TensorRT, each called like the module it replaces."""
