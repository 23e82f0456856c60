"""gdn-ir: one program for the gated delta rule, compiled."""
