"""What a run will cost before it starts: parameters, operations, memory, time, energy."""
