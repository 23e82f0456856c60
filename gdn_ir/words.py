"""What the options of several commands say of themselves. (Apart, so that --help waits for no torch.)"""

ONE = "1x8192:16/32"                                       # a call, where one is wanted and none is named
SHAPE = "8x1024:16/32 or 3000+5192:16/32 (lengths, H/HV)"
SHAPES = f"{SHAPE}, or the index of a row of the suite forward, separated by commas; or a suite's name"
OP = "forward, backward or recurrent (one token at a time)"
FLAGS = "of the op, separated by commas, e.g. l2norm,initial_state,no-final_state,no-decay (a forward has final_state)"
DENSE = "not packed: all sequences of one length"
GRADS = "of a backward: gradients, separated by commas, such as q,k,v,g,beta,initial_state (all)"
KEEP = "what a forward leaves to its backward, or a backward is given: nothing, inverse or states"
