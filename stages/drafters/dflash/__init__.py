"""DFlash (arXiv 2602.06036): one forward drafts a whole block."""
