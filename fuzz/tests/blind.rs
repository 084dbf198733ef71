//! The seeds of every target and a few thousand mutations of them, without coverage: what can be run with any compiler,
//! by `cargo test --manifest-path fuzz/Cargo.toml --no-default-features`. RAKAM_FUZZ_BLIND says how many mutations.

use std::env;

use rakam_event::testing::Random;
use rakam_fuzz::targets::{ALL, Target};

/// The input with some bytes changed, taken out, put in or taken from another place; rarely with one of another seed's.
fn mutated(random: &mut Random, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.next() % 4 {
        if bytes.is_empty() {
            return bytes;
        }
        let at = (random.next() % bytes.len() as u64) as usize;
        let length = (random.next() % 9) as usize;
        match random.next() % 8 {
            0 | 1 => bytes[at] ^= 1 << (random.next() % 8),
            2 => bytes[at] = random.next() as u8,
            3 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, 0xfe, b'"', b'\\'][length % 8],
            4 => drop(bytes.drain(at..(at + length).min(bytes.len()))),
            5 => drop(bytes.splice(at..at, random.next().to_le_bytes())),
            6 => bytes.truncate(at + 1),
            _ => {
                let from = (random.next() as usize) % other.len().max(1);
                let piece = other.get(from..).unwrap_or_default();
                let piece = piece[..piece.len().min(4 * length)].to_vec();
                drop(bytes.splice(at..(at + piece.len()).min(bytes.len()), piece));
            }
        }
    }
    bytes
}

fn run(name: &str) {
    let (_, target, seeds): (_, Target, _) = ALL.into_iter().find(|(n, ..)| *n == name).unwrap();
    let seeds = seeds();
    for seed in &seeds {
        target(seed);
    }
    let mutations = env::var("RAKAM_FUZZ_BLIND").map_or(2_000, |n| n.parse().unwrap());
    for n in 0..mutations {
        let mut random = Random(n);
        let mut pick = || &seeds[(random.next() % seeds.len() as u64) as usize];
        let (input, other) = (pick(), pick());
        let input = mutated(&mut random, input, other);
        let shown = input.clone();
        let ran = std::panic::catch_unwind(move || target(&input));
        assert!(ran.is_ok(), "mutation {n} of {name}: {shown:02x?}");
    }
}

#[test]
fn event() {
    run("event");
}

#[test]
fn jsonb() {
    run("jsonb");
}

#[test]
fn files() {
    run("files");
}

#[test]
fn avro() {
    run("avro");
}

#[test]
fn stored() {
    run("stored");
}

#[test]
fn text() {
    run("text");
}
