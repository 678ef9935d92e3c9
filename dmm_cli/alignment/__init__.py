"""Units of two networks brought into one order, so that they can be averaged: spec, matching, verification.

``trace`` finds out from the module which units may change places, ``matching`` which of them should, ``apply``
does it, and ``verify`` makes sure that the function stays the same.
"""
