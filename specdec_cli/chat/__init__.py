"""`specdec chat`: the conversation, its commands, and the line that is typed."""
