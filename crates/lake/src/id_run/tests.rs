use super::*;

/// Entries with the hashes of numbered ids, sorted.
fn entries(n: usize) -> Vec<IdEntry> {
    let mut entries: Vec<IdEntry> = (0..n)
        .map(|k| IdEntry {
            hash: hash(1, &format!("id-{k}")),
            received_us: 1_000_000 + k as i64,
        })
        .collect();
    entries.sort();
    entries
}

fn ids(entries: &[IdEntry], base_us: i64) -> Ids {
    Ids::open(encode(entries, base_us).unwrap().into(), base_us).unwrap()
}

#[test]
fn hashes_never_change() {
    // Stored in databases: another value here is another format. These are SipHash-1-3-128 by another program.
    assert_eq!(hash(1, ""), 0x247e9a74_e0fab9d0_610029ba_d61c66f8);
    assert_eq!(
        hash(1, "0123456789abcdef-x"),
        0x51cec44f_254e99a8_76d164a0_185d9add
    );
    assert_ne!(hash(1, "a"), hash(2, "a"));
}

#[test]
fn what_was_written_is_read() {
    let far = 1_000_000 + (1 << 47);
    let mut written = entries(1_000);
    written[7].received_us = far;
    let read = ids(&written, 1_000_000);
    assert_eq!(read.iter().collect::<Vec<_>>(), written);
    assert_eq!(read.len() * ENTRY_BYTES, read.byte_len());
    assert!(encode(&written, 1_000_001).is_err());
    written[7].received_us = i64::MAX;
    assert!(encode(&written, 1_000_000).is_err());
    assert!(Ids::slice(vec![0; ENTRY_BYTES + 1].into(), 0).is_err());
    assert!(ids(&[], 0).is_empty());
}

#[test]
fn the_format_is_what_it_was() {
    let entry = IdEntry {
        hash: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        received_us: 0x1_0000,
    };
    let bytes = encode(&[entry], 1).unwrap();
    assert_eq!(bytes[..4], *b"RKI1");
    let payload: Vec<u8> = (1..=16).chain([0, 0, 0, 0, 0xff, 0xff]).collect();
    assert_eq!(bytes[ENTRIES_AT..], payload);
}

#[test]
fn every_copy_of_an_id_is_found() {
    let mut written = entries(500);
    let twice = IdEntry {
        received_us: written[100].received_us + 50,
        ..written[100]
    };
    written.push(twice);
    written.sort();
    let read = ids(&written, 1_000_000);
    for entry in &written {
        assert!(read.of_hash(entry.hash).any(|found| found == *entry));
    }
    assert_eq!(read.of_hash(twice.hash).count(), 2);
    for absent in [0, u128::MAX, hash(2, "id-1")] {
        assert_eq!(read.of_hash(absent).count(), 0);
    }
}

#[test]
fn the_window_ends_where_it_says() {
    let at = |received_us| IdEntry {
        hash: 1,
        received_us,
    };
    assert!(at(100).is_copy_of(&at(110), 10) && at(110).is_copy_of(&at(100), 10));
    assert!(!at(100).is_copy_of(&at(111), 10) && !at(111).is_copy_of(&at(100), 10));
    assert!(!at(i64::MIN).is_copy_of(&at(i64::MAX), i64::MAX));
}

#[test]
fn nodes_are_ranges_of_hashes() {
    assert_eq!(Node::ROOT.last(), u64::MAX);
    let child = Node::of(0xffff_0000_0000_0000, 1);
    assert_eq!((child.first, child.last()), (7 << 61, u64::MAX));
    let grandchild = Node::of(0xffff_0000_0000_0000, 2);
    assert_eq!(
        grandchild.ancestors().collect::<Vec<_>>(),
        [Node::ROOT, child]
    );
    assert_eq!(Node::ROOT.ancestors().count(), 0);
    let deep = Node::of(u64::MAX, DEPTH_MAX);
    assert_eq!(deep.last() - deep.first, 15);
    assert_eq!(Node::ROOT.position(0, 10), 0);
    assert_eq!(Node::ROOT.position(u128::MAX, 10), 9);
    assert_eq!(child.position(u128::from(child.first) << 64, 10), 0);
}

#[test]
fn parts_have_a_bounded_size_and_all_entries() {
    let all = entries(3 * PART_IDS);
    let parts = lay_out(&all, 0);
    assert_eq!(parts.len(), 8);
    assert!(parts.iter().all(|(_, part)| part.len() <= PART_IDS));
    let again: Vec<IdEntry> = parts.iter().flat_map(|(_, part)| part.to_vec()).collect();
    assert_eq!(again, all);
    for (node, part) in &parts {
        assert!(part.iter().all(|e| *node == Node::of(e.upper(), 1)));
    }
    assert_eq!(lay_out(&all[..10], 0).len(), 1);
    assert_eq!(lay_out(&all[..10], 0)[0].0, Node::ROOT);
    assert!(
        lay_out(&all[..10], 2)
            .iter()
            .all(|(node, _)| node.depth == 2)
    );
    assert!(lay_out(&[], 0).is_empty());
}

#[test]
fn sizes_have_classes() {
    let classes: Vec<i16> = [0, 1, 7, 8, 63, 64, PART_IDS].map(level).to_vec();
    assert_eq!(classes, [0, 0, 0, 1, 1, 2, 5]);
}

#[test]
fn a_neighbourhood_decides_nearly_always() {
    let all = entries(20_000);
    let mut conclusive = 0;
    for (node, part) in lay_out(&all, 1) {
        let n = part.len();
        for (index, entry) in part.iter().enumerate() {
            let range = neighbourhood(node, n, entry.hash);
            let bytes = encode(&part[range.clone()], 1_000_000).unwrap();
            let cut = Ids::slice(Bytes::from(bytes).slice(ENTRIES_AT..), 1_000_000).unwrap();
            if cut.is_conclusive(&range, n, entry.hash) {
                conclusive += 1;
                assert!(cut.of_hash(entry.hash).any(|e| e == *entry), "{index}");
            }
        }
    }
    assert!(conclusive > all.len() * 99 / 100, "{conclusive}");
}
