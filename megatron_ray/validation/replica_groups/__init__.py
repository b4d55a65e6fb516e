"""Rules for replica groups that synchronize every few steps."""
