"""One network convention for every video transformer: velocity, sigma in [0, 1], tensors B C T H W."""
