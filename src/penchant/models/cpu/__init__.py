"""CPU kernels of Llama-type models."""
