"""What passes that quantize share: ranges from calibration data, scales, and layers that compute with integers."""
