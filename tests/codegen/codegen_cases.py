"""Compiled code written by hand: one loop in Triton's GPU dialect, and machine code to go with it."""

import json

# A loop over keys as a pipeline leaves it: K is copied ahead into two slots, the row's bounds are copied too although
# they never change, the bias of a key is loaded in place, and names come again in the second loop.
HEAD = """\
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [1, 1], order = [1, 0]}>
#smem = #ttg.shared_memory
#loc = loc("/somewhere/kernel (1).py":40:0)
#loc1 = loc("/somewhere/kernel (1).py":46:8)
#loc2 = loc("/somewhere/kernel (1).py":41:8)
#loc3 = loc("bias"("/somewhere/kernel (1).py":47:16))
#loc4 = loc(callsite(#loc3 at #loc2))
#loc5 = loc("/usr/lib/helpers.py":9:4)
#loc6 = loc(callsite(#loc5 at #loc1))
#loc7 = loc(fused<{a = "b"}>[unknown, callsite(#loc1 at #loc2), #loc5])
module attributes {"ttg.num-warps" = 1 : i32, ttg.target = "cuda:80"} {
  tt.func public @attend(%k_ptr: !tt.ptr<bf16> loc("k"(#loc)), %t: !tt.ptr<i32>, %q: tensor<16x16xbf16>, %n: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %cst = arith.constant dense<0.000000e+00> : tensor<16x16xf32> loc(#loc)
    %p = arith.constant dense<1.000000e+00> : tensor<16x16xbf16> loc(#loc)
    %r = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32> loc(#loc)
    %cols = tt.expand_dims %r {axis = 0 : i32} : tensor<16xi32> -> tensor<1x16xi32> loc(#loc)
    %rows = tt.expand_dims %r {axis = 1 : i32} : tensor<16xi32> -> tensor<16x1xi32> loc(#loc)
    %kb = ttg.local_alloc : () -> !ttg.memdesc<2x16x16xbf16, #shared, #smem, mutable> loc(#loc)
    %rb = ttg.local_alloc : () -> !ttg.memdesc<2x16x1xi32, #shared, #smem, mutable> loc(#loc)
    %all = tt.broadcast %rows : tensor<16x1xi32> -> tensor<16x16xi32> loc(#loc)
    %s = tt.splat %k_ptr : !tt.ptr<bf16> -> tensor<16x16x!tt.ptr<bf16>> loc(#loc)
    %first = tt.addptr %s, %all : tensor<16x16x!tt.ptr<bf16>>, tensor<16x16xi32> loc(#loc)
    %ts = tt.splat %t : !tt.ptr<i32> -> tensor<16x1x!tt.ptr<i32>> loc(#loc)
    %tr = tt.addptr %ts, %rows : tensor<16x1x!tt.ptr<i32>>, tensor<16x1xi32> loc(#loc)
    %tc = tt.splat %t : !tt.ptr<i32> -> tensor<1x16x!tt.ptr<i32>> loc(#loc)
    %te = tt.splat %t : !tt.ptr<i32> -> tensor<16x16x!tt.ptr<i32>> loc(#loc)
    %slot = ttg.memdesc_index %kb[%c0] : !ttg.memdesc<2x16x16xbf16> -> !ttg.memdesc<16x16xbf16> loc(#loc)
    %ahead = ttg.async_copy_global_to_local %first, %slot : tensor<16x16x!tt.ptr<bf16>> -> <16x16xbf16> loc(#loc)
"""
LOOP = """\
    %out:3 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %cst, %at = %c0, %token = %ahead) -> TYPES  : i32 {
      %m = arith.cmpi slt, %i, %n : i32 loc(#loc1)
      %kv = ttg.memdesc_index %kb[%at] : !ttg.memdesc<2x16x16xbf16> -> !ttg.memdesc<16x16xbf16> loc(#loc1)
      %k = ttg.local_load %kv token %token : !ttg.memdesc<16x16xbf16> -> tensor<16x16xbf16> loc(#loc1)
      %kt = tt.trans %k {order = array<i32: 1, 0>} : tensor<16x16xbf16> -> tensor<16x16xbf16> loc(#loc1)
      %qk = tt.dot %q, %kt, %cst : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32> loc(#loc1)
LOADS
      %ro = ttg.local_load %rd : !ttg.memdesc<16x1xi32> -> tensor<16x1xi32> loc(#loc1)
      %o = tt.dot %p, %k, %acc : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32> loc(#loc1)
      %next = arith.addi %at, %c1 : i32 loc(#loc1)
      %sp = tt.splat %next : i32 -> tensor<16x16xi32> loc(#loc1)
      %pp = tt.addptr %first, %sp : tensor<16x16x!tt.ptr<bf16>>, tensor<16x16xi32> loc(#loc1)
      %to = ttg.memdesc_index %kb[%next] : !ttg.memdesc<2x16x16xbf16> -> !ttg.memdesc<16x16xbf16> loc(#loc1)
      %copy = ttg.async_copy_global_to_local %pp, %to mask %m : tensor<16x16x!tt.ptr<bf16>> -> <16x16xbf16> loc(#loc6)
      scf.yield %o, %next, %copy : tensor<16x16xf32>, i32, !ttg.async.token loc(#loc1)
    } loc(#loc7)
"""
ROW = """\
      %rd = ttg.memdesc_index %rb[%at] : !ttg.memdesc<2x16x1xi32> -> !ttg.memdesc<16x1xi32> loc(#loc1)
      %rc = ttg.async_copy_global_to_local %tr, %rd mask %m : tensor<16x1x!tt.ptr<i32>> -> <16x1xi32> loc(#loc4)"""
SCALARS = """
      %tp = tt.addptr %t, %i : !tt.ptr<i32>, i32 loc(#loc1)
      %tile = tt.load %tp, %m : !tt.ptr<i32> loc(#loc4)
      %head = tt.load %t : !tt.ptr<i32> loc(#loc4)"""
COLUMN = """
      %sc = tt.splat %at : i32 -> tensor<1x16xi32> loc(#loc1)
      %pos = arith.addi %sc, %cols : tensor<1x16xi32> loc(#loc1)
      %cp = tt.addptr %tc, %pos : tensor<1x16x!tt.ptr<i32>>, tensor<1x16xi32> loc(#loc1)
      %col = tt.load %cp : tensor<1x16x!tt.ptr<i32>> loc(#loc4)"""
ELEMENT = """
      %bc = tt.broadcast %pos : tensor<1x16xi32> -> tensor<16x16xi32> loc(#loc1)
      %sum = arith.addi %bc, %all : tensor<16x16xi32> loc(#loc1)
      %ep = tt.addptr %te, %sum : tensor<16x16x!tt.ptr<i32>>, tensor<16x16xi32> loc(#loc1)
      %el = tt.load %ep : tensor<16x16x!tt.ptr<i32>> loc(#loc4)"""
VIA_ROW = """
      %via = ttg.local_load %rd : !ttg.memdesc<16x1xi32> -> tensor<16x1xi32> loc(#loc1)
      %vp = tt.addptr %ts, %via : tensor<16x1x!tt.ptr<i32>>, tensor<16x1xi32> loc(#loc1)
      %v = tt.load %vp, %mm : tensor<16x1x!tt.ptr<i32>> loc(#loc4)"""
VIA_TILE = """
      %tt = tt.splat %tile : i32 -> tensor<1x16xi32> loc(#loc1)
      %tq = tt.addptr %tc, %tt : tensor<1x16x!tt.ptr<i32>>, tensor<1x16xi32> loc(#loc1)
      %tq2 = tt.addptr %tq, %cols : tensor<1x16x!tt.ptr<i32>>, tensor<1x16xi32> loc(#loc1)
      %tv = tt.load %tq2 : tensor<1x16x!tt.ptr<i32>> loc(#loc4)"""
TYPES = "(tensor<16x16xf32>, i32, !ttg.async.token)"
TAIL = """\
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
SOURCE = """\
def attend(k, t, q, n):
    inner(
        k,
        IS_FULL_BLOCKS=False,
    )

    for i in range(n):
        bias = tl.load(t + i)
"""


def module(*bodies: str) -> str:
    return HEAD + "".join(LOOP.replace("LOADS", body).replace("TYPES", TYPES) for body in bodies) + TAIL


def assemble(*lines: str, name: str = "attend") -> str:
    """Machine code as nvdisasm lists it: labels are written ``name:`` and used as ``@name@``."""
    places, code = {}, []
    for line in lines:
        label, colon, rest = line.partition(":")
        if colon and label.isidentifier():
            places[label] = 16 * len(code)
            line = rest
        code.append(line.strip())
    listed = []
    for line in code:
        for label, place in places.items():
            line = line.replace(f"@{label}@", f"0x{place:x}")
        guard, rest = line.split(" ", 1) if line.startswith("@") else ("", line)
        opcode, _, operands = rest.partition(" ")
        parts = {"predicate": guard, "opcode": opcode, "operands": operands.replace(" ", "")}
        listed.append({key: value for key, value in parts.items() if value})
    return json.dumps([{"SM": {}}, [{"function-name": name, "start": 0, "sass-instructions": listed}]])


HMMA = "HMMA.16816.F32.BF16 R4, R8, R10, R4"  # 16 * 8 * 16 multiply-adds: the loop's two products of 16**3 take four
