"""Attention, norms and activations in integers: each function a composition of ops of the IR on i32 and i64."""
