"""Binary and sparse vision layers in C++: XNOR and population count, N:M and 1xN products, for any CPU."""
