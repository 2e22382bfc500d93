"""Kernels for CPUs that are compiled on the machine on which they run, in fp32."""
