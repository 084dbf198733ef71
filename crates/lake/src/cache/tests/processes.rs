//! Other processes: that share the directory, are killed in it, or have a disk that is full.

use std::fs;
use std::path::Path as FilePath;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;

use super::super::{Directory, ObjectKey};
use super::{MIB, files, object};
use crate::testing::Rng;

const CHILD: &str = "RAKAM_TEST_CACHE_DIRECTORY";

/// Blocks of objects that every process makes alike.
fn block_of(n: u64, number: u64) -> Bytes {
    object(MIB, 1000 * n + number)
}

fn child_key(n: u64) -> ObjectKey {
    ObjectKey {
        storage: "s".to_owned(),
        path: n.to_string(),
    }
}

/// Not a test: what other processes of the tests below do, until they are killed.
#[test]
fn child() {
    let Some(home) = std::env::var_os(CHILD) else {
        return;
    };
    let directory = Directory::new(FilePath::new(&home), 24 * MIB);
    let mut rng = Rng::new(u64::from(std::process::id()));
    for _ in 0..300 {
        let (n, number) = (rng.below(8), rng.below(5));
        let found = directory.read(
            &child_key(n),
            5 * MIB,
            number,
            number * MIB..(number + 1) * MIB,
        );
        match found {
            Some((start, bytes)) => {
                assert!(start == number * MIB && bytes == block_of(n, number));
            }
            None => directory.store(&child_key(n), 5 * MIB, number, &block_of(n, number)),
        }
    }
    if let Some(trouble) = directory.trouble() {
        println!("trouble: {trouble}");
    }
}

fn spawn(home: &FilePath, wrap: Option<&str>) -> std::process::Child {
    let exe = std::env::current_exe().unwrap();
    let arguments = ["--exact", "cache::tests::processes::child", "--nocapture"];
    let mut command = match wrap {
        Some(script) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", script, "sh"]).arg(exe);
            shell
        }
        None => Command::new(exe),
    };
    command
        .args(arguments)
        .env(CHILD, home)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Whatever is there is right.
fn check(home: &FilePath) -> usize {
    let directory = Directory::new(home, 24 * MIB);
    let mut there = 0;
    for (n, number) in (0..8).flat_map(|n| (0..5).map(move |number| (n, number))) {
        let part = number * MIB..(number + 1) * MIB;
        if let Some((_, bytes)) = directory.read(&child_key(n), 5 * MIB, number, part) {
            assert!(bytes == block_of(n, number));
            there += 1;
        }
    }
    there
}

#[test]
fn processes_share_it_and_may_be_killed() {
    let home = tempfile::tempdir().unwrap();
    for round in 0..4 {
        let mut children: Vec<_> = (0..2).map(|_| spawn(home.path(), None)).collect();
        // Later each time, so that some die while they write.
        while files(home.path()).len() < 2 + round * 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        children[0].kill().unwrap();
        children[0].wait().unwrap();
        let other = children.pop().unwrap().wait_with_output().unwrap();
        assert!(
            other.status.success(),
            "{}",
            String::from_utf8_lossy(&other.stdout)
        );
        assert!(check(home.path()) > 0);
    }
    let bytes: u64 = files(home.path())
        .iter()
        .map(|path| fs::metadata(path).unwrap().len())
        .sum();
    assert!(bytes <= 25 * MIB, "{bytes}");
}

#[test]
fn a_disk_that_takes_no_more_is_harmless() {
    let home = tempfile::tempdir().unwrap();
    // Files may not grow beyond half a block: writing fails in its middle, as on a full disk.
    let full = "trap '' XFSZ; ulimit -f 512; exec \"$@\"";
    let child = spawn(home.path(), Some(full)).wait_with_output().unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && output.contains("trouble: "),
        "{output}"
    );
    assert_eq!(check(home.path()), 0);
    let temporary = Directory::new(home.path(), MIB).root().join("tmp");
    assert_eq!(fs::read_dir(temporary).unwrap().count(), 0);
}
