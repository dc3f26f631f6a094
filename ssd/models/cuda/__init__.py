"""CUDA graphs, streams and buffers."""
