"""Fused tensor operations: a reference, a closed form and a Triton kernel of the same values, and what picks one."""
