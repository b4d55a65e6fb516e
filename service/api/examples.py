"""Holds the example bodies of the OpenAPI document.

Owns: one job, as every answer about it shows it. A test validates each example. Must not
know: routes.
"""

from typing import Any

Json = dict[str, Any]

_JOB_ID = "job-4nkjx2s7qzta"
_FOLDER = f"/home/ada/.megatron-ray/jobs/{_JOB_ID}"
_AT = "2026-11-29T10:15:30Z"
_NODE_ID = "2f1d6c0b8a7e4f3d9b5a1c0e7d6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b"
SPEC: Json = {
    "name": "stdlib",
    "model": {"preset": "gpt-tiny"},
    "data": {
        "train": [{"path": "builtin://python-stdlib"}],
        "tokenizer": {"kind": "bpe", "vocab_size": 4096},
    },
    "training": {"seq_length": 256, "global_batch_size": 8, "steps": 60},
    "optimizer": {"lr": 0.003},
    "metadata": {"team": "search"},
}
_STEP: Json = {"loss": 5.2556, "grad_norm": 0.91, "lr": 0.0003, "tokens_per_s": 1437.0}
_SUMMARY: Json = {
    "object": "job",
    "id": _JOB_ID,
    "name": "stdlib",
    "status": "running",
    "status_reason": None,
    "message": "",
    "desired_state": "run",
    "pause_reason": None,
    "resumes": 0,
    "cluster": "default",
    "priority": 0,
    "metadata": {"team": "search"},
    "created_at": "2026-11-29T10:12:04Z",
    "started_at": _AT,
    "ended_at": None,
    "attempt": 1,
    "failures": 0,
    "preemptions": 0,
    "progress": {
        "step": 41,
        "steps": 60,
        "loss": 5.2556,
        "tokens_per_s": 1437.0,
        "eta_s": 27.1,
        "mfu": None,
        "val_loss": 5.9712,
        "source_val_losses": {},
        "unigram_nats": 6.4203,
    },
    "problem": None,
    "storage_path": _FOLDER,
    "last_checkpoint": {
        "step": 40,
        "path": f"{_FOLDER}/checkpoints/step-00000040-a0001",
        "committed_at": "2026-11-29T10:16:41Z",
    },
}
_JOB: Json = {**_SUMMARY, "spec": SPEC, "resolved_spec": SPEC}
_EVENT: Json = {
    "object": "job.event",
    "id": f"{_JOB_ID}.12",
    "seq": 12,
    "job_id": _JOB_ID,
    "attempt": 1,
    "created_at": "2026-11-29T10:16:41Z",
    "level": "info",
    "type": "checkpoint.committed",
    "message": "checkpoint of step 40 committed",
    "data": {"action": "committed", "step": 40},
    "ranks": [],
    "actor": "system",
}
_TIME: Json = {
    "step_s": 0.2325,
    "products_s": 0.1711,
    "attention_s": 0.0204,
    "memory_s": 0.0301,
    "communication_s": 0.0,
    "bubble_s": 0.0,
    "update_s": 0.0109,
    "tokens_per_s": 8808.6,
    "mfu": 0.481,
    "model_flops": 2.4e10,
}
PROBLEM: Json = {
    "type": "urn:megatron-ray:problem:spec_invalid",
    "title": "The job spec cannot run",
    "status": 422,
    "detail": "/parallel/tp: tp=3 does not divide model.num_attention_heads=4; use 1, 2 or 4",
    "code": "spec_invalid",
    "errors": [
        {
            "pointer": "/parallel/tp",
            "code": "tp_divides_heads",
            "detail": "tp=3 does not divide model.num_attention_heads=4; use 1, 2 or 4",
        }
    ],
    "instance": "/v1/jobs",
    "request_id": "req-5f0c1d2e3a4b5c6d",
}
_MESSAGE: Json = {
    "event": "metrics",
    "id": f"{_JOB_ID}.12.41",
    "data": '{"rows":[{"step":41,"attempt":1,"loss":5.2556}]}',
}


def _page(*entries: Json, id_of: str = "id") -> Json:
    return {
        "object": "list",
        "data": list(entries),
        "first_id": str(entries[0][id_of]),
        "last_id": str(entries[-1][id_of]),
        "has_more": False,
        "total": len(entries),
    }


REQUESTS: dict[str, Any] = {
    "exclude_node": {"node": "192.0.2.2", "reason": "a fan is broken"},
    "create_job": SPEC,
    "create_plan": SPEC,
    "suggest_layouts": SPEC,
    "cancel_job": {"checkpoint": True},
    "pause_job": {"reason": "user_paused"},
    "resize_job": {"dp": 2},
    "resume_job": {"changes": {"training": {"steps": 2000}}},
    "profile_job": {"steps": "50-52", "ranks": [0]},
    "cancel_jobs": {"status": ["queued"], "metadata": {"sweep": "lr"}},
}
"""Example body of each request, by operation id."""
_EXCLUSION: Json = {
    "node_id": _NODE_ID,
    "address": "192.0.2.2",
    "reason": "rank 3: CUDA error: uncorrectable ECC error encountered",
    "since": _AT,
    "by": _JOB_ID,
}
_CLUSTER: Json = {
    "object": "cluster",
    "name": "default",
    "live": True,
    "agent_silence_s": 0.4,
    "reported_at": _AT,
    "agent_id": "agent-7f3a",
    "code_version": "0.1.0",
    "ray_version": "2.60.0",
    "namespace": "megatron-ray-1f2e3d4c",
    "dashboard_url": "http://127.0.0.1:8265",
    "nodes": [
        {
            "node_id": _NODE_ID,
            "address": "192.0.2.2",
            "alive": True,
            "cpus": 2.0,
            "gpus": 0.0,
            "accelerator_type": None,
            "memory_bytes": 8_589_934_592,
            "labels": {},
            "storage_ok": True,
            "draining": False,
            "drain_deadline": None,
            "excluded": _EXCLUSION["reason"],
        }
    ],
    "excluded_nodes": [_EXCLUSION],
    "node_groups": [],
    "drivers": [{"job_id": _JOB_ID, "alive": True, "detail": ""}],
    "orphans": [],
}
_PROFILE: Json = {
    "object": "job.profile",
    "id": f"{_JOB_ID}.profile-1-1",
    "job_id": _JOB_ID,
    "number": 1,
    "attempt": 1,
    "created_at": _AT,
    "status": "written",
    "first_step": 50,
    "last_step": 52,
    "ranks": [0],
    "folder": f"{_FOLDER}/profiles/steps-00000050-00000052-a0001",
    "reports": [
        {
            "rank": 0,
            "files": ["rank-00000.trace.json.gz", "rank-00000.memory.json"],
            "seconds": 0.791,
            "operators": [
                {"name": "aten::mm", "calls": 288, "seconds": 0.412, "share": 0.58}
            ],
            "problem": None,
        }
    ],
}
RESPONSES: dict[str, Any] = {
    "create_job": _JOB,
    "list_jobs": _page(_SUMMARY),
    "get_job": _JOB,
    "cancel_job": {**_JOB, "status": "cancelling", "desired_state": "cancel"},
    "resize_job": _JOB,
    "pause_job": {**_JOB, "desired_state": "pause", "pause_reason": "user_paused"},
    "resume_job": _JOB,
    "checkpoint_job": _JOB,
    "cancel_jobs": {
        "object": "job.cancellation",
        "cancelled": [{"id": _JOB_ID, "name": "stdlib", "status": "cancelled"}],
        "ended": [],
        "not_found": [],
        "has_more": False,
    },
    "list_events": _page(_EVENT),
    "stream_job": _MESSAGE,
    "list_metrics": _page({"step": 41, "attempt": 1, **_STEP}, id_of="step"),
    "read_log": {
        "object": "log",
        "rank": 0,
        "attempt": 1,
        "offset": 0,
        "next_offset": 21,
        "size": 21,
        "data": "rank 0: data is ready",
    },
    "list_checkpoints": _page(
        {
            "object": "checkpoint",
            **_SUMMARY["last_checkpoint"],
            "attempt": 1,
            "bytes": 22_112_204,
            "loss": 5.2602,
        },
        id_of="path",
    ),
    "list_attempts": _page(
        {
            "object": "attempt",
            "attempt": 1,
            "state": "running",
            "reason": None,
            "message": "training starts at step 0",
            "world_size": 1,
            "started_at": "2026-11-29T10:15:22Z",
            "ended_at": None,
        },
        id_of="attempt",
    ),
    "list_ranks": _page(
        {
            "rank": 0,
            "slot": 0,
            "node_id": _NODE_ID,
            "address": "192.0.2.2",
            "gpu": None,
            "pid": 24852,
            "coordinates": {"tp": 0, "cp": 0, "ep": 0, "dp": 0, "pp": 0},
            "log_url": (
                "http://127.0.0.1:8265/#/logs/viewer?nodeId="
                f"{_NODE_ID}&fileName=megatron-ray%2F{_JOB_ID}%2F"
                "attempt-0001%2Frank-00000.log"
            ),
        },
        id_of="rank",
    ),
    "diagnose_job": _JOB,
    "get_diagnosis": {
        "object": "job.diagnosis",
        "id": f"{_JOB_ID}.14",
        "job_id": _JOB_ID,
        "attempt": 1,
        "created_at": _AT,
        "trigger": "hang",
        "reason": "rank 1 has not entered all_reduce 812 of tp, in which rank 0 has waited for "
        "12 s; it reads data in IndexedCorpus.read (megatron_ray/data/indexed.py:88)",
        "confidence": "high",
        "quiet_s": 12.1,
        "culprits": [{"rank": 1, "address": "192.0.2.2", "pid": 23685}],
        "num_ranks": 2,
        "num_silent": 0,
        "ranks": [],
        "stacks": [
            {
                "ranks": [1],
                "lines": ["IndexedCorpus.read (megatron_ray/data/indexed.py:88)"],
            }
        ],
    },
    "list_profiles": _page(_PROFILE),
    "profile_job": {**_PROFILE, "status": "pending", "reports": []},
    "create_plan": {
        "object": "plan",
        "resolved_spec": SPEC,
        "world_size": 1,
        "ranks": [{"rank": 0, "coordinates": {"tp": 0, "dp": 0, "pp": 0}, "island": 0}],
        "memory": {
            "rank": 0,
            "parameters_bytes": 7_340_032,
            "gradients_bytes": 7_340_032,
            "optimizer_bytes": 14_680_064,
            "offloaded_bytes": 0,
            "gathered_bytes_estimate": 0,
            "activations_bytes_estimate": 62_914_560,
            "total_bytes_estimate": 92_274_688,
            "vocab_size": 4096,
        },
        "communication": [],
        "checkpoint_bytes": 22_020_096,
        "num_checkpoints": 3,
        "bubble_share": 0.0,
        "hardware": "CPU",
        "time": _TIME,
        "fits": True,
        "room": 2,
        "new_nodes": {},
        "problems": [],
        "notes": [],
    },
    "suggest_layouts": {
        "object": "plan.suggestions",
        "world_size": 2,
        "hardware": "CPU",
        "data": [
            {
                "changes": {"parallel.tp": 1, "parallel.dp": 2},
                "total_bytes_estimate": 85_983_232,
                "time": _TIME,
            }
        ],
        "notes": [],
    },
    "list_clusters": _page(_CLUSTER, id_of="name"),
    "exclude_node": _CLUSTER,
    "include_node": {**_CLUSTER, "excluded_nodes": []},
}
"""Example body of each answer, by operation id."""
