"""GPU programs in Triton, one file an operation. They import triton, so they are imported inside functions only."""
