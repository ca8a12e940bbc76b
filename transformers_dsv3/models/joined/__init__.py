"""DeepSeek-V3's text joined to a vision tower, in the layouts that others open: `internvl`, and Kimi's.

The classes are imported when such a config is, see `registration.py`.
"""
