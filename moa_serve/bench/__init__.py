"""`moa-serve bench`: how fast, as ratios of two things in one interleaved run. Nothing here serves; nothing imports it but the shell."""
