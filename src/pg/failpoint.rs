//! Named points where a test may make the server misbehave: `SET rakam.failpoint = 'flush.before_commit=exit'`.
//!
//! Actions: `error` (an ERROR), `panic` (a Rust panic), `exit` (the process ends at once, as by kill -9),
//! `sleep(ms)` (interruptible; in a worker it ends once the setting does not name the point any more). Several, separated by `;`. The setting is superuser-only.

use std::time::Duration;

use super::error::PgError;
use super::{bgworker, guc, wait};

/// Does what `rakam.failpoint` says about this point; free when it is unset.
pub fn hit(name: &str) {
    let Some(spec) = guc::failpoint() else { return };
    for entry in spec.split(';') {
        if let Some((point, action)) = entry.split_once('=')
            && point.trim() == name
        {
            act(name, action.trim());
        }
    }
}

fn act(name: &str, action: &str) {
    match action {
        "error" => PgError::new("XX000", format!("failpoint \"{name}\"")).raise(),
        "panic" => panic!("failpoint \"{name}\""),
        "exit" => {
            // SAFETY: ends this process as a crash would; that is the point.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        _ => {
            let ms = action
                .strip_prefix("sleep(")
                .and_then(|rest| rest.strip_suffix(')'))
                .and_then(|ms| ms.parse().ok())
                .unwrap_or(0);
            let end = std::time::Instant::now() + Duration::from_millis(ms);
            while let Some(rest) = end.checked_duration_since(std::time::Instant::now()) {
                if rest.is_zero() {
                    break;
                }
                wait::wait(None, rest);
                bgworker::reload_in_worker();
                if !guc::failpoint().is_some_and(|spec| spec.contains(name)) {
                    break;
                }
            }
        }
    }
}
