"""C++ operators for CPUs, and the layers that use them."""
