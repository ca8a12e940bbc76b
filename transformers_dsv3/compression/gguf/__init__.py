"""GGUF files, llama.cpp's: written from checkpoints, and read as they are."""
