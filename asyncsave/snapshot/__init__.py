"""Stage 2: live memory to slots of the arena. The only stage that the training thread waits for."""
