"""python -m gdn_ir: the command line."""
from gdn_ir.cli import main

if __name__ == "__main__":
    main()
