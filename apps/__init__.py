"""The programs around the library; installed as `lowrank_align.apps`."""
