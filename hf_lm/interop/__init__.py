"""Reading the checkpoints of other families, and handing models back to them (README.md in this folder)."""
