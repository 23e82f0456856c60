"""Modules made of the ops."""
from gdn_ir.nn.gated_delta_net import GatedDeltaNet, State

__all__ = ["GatedDeltaNet", "State"]
