"""Tests of one role: guests in slots, Molecule's scenarios, their runner, its evidence, breaks, new roles."""
