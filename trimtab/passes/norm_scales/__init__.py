"""Scales and shifts of channels that move between what makes a value and the linear layers that read it.

``links`` finds the places, ``statistics`` looks at the values there on calibration data, ``migration`` moves the
numbers and writes every changed weight once.
"""
