"""What the command line does besides composing: understand what is asked, write what comes of it, and say what was."""
