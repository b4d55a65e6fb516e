"""The synchronization of replica groups, which otherwise take their steps by themselves."""
