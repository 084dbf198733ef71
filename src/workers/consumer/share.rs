//! Which splits of a source a consumer reads: a decision without I/O, made by each consumer for itself. All that look at the same
//! leases and the same consumers come to shares that fit together; those that do not yet meet at the leases.

use std::collections::HashMap;

use crate::catalog::sources::leases::Lease;

/// What a consumer is to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share {
    pub take: Vec<Lease>,
    pub give_back: Vec<String>,
    /// Splits that are another's by now.
    pub lost: Vec<String>,
}

/// Who decides, among whom.
#[derive(Debug, Clone, Copy)]
pub struct Among<'a> {
    pub me: i32,
    /// The consumers that live, this one included, in an order that is the same for all of them.
    pub live: &'a [i32],
    /// So many splits of a source are read at a time.
    pub most: usize,
}

/// The share of a source's open splits. `held`: the splits that this consumer reads, with their epochs.
pub fn share(
    source_id: i32,
    open: &[Lease],
    held: &HashMap<String, i64>,
    among: Among<'_>,
) -> Share {
    let is_ours = |lease: &&Lease| held.get(&lease.split) == Some(&lease.epoch);
    let ours: Vec<&Lease> = open.iter().filter(is_ours).collect();
    let lost = held
        .keys()
        .filter(|split| !ours.iter().any(|lease| lease.split == **split))
        .cloned()
        .collect();
    // A row of an earlier process of the same id is nobody's.
    let is_free = |lease: &&Lease| {
        !is_ours(lease)
            && lease
                .holder
                .is_none_or(|holder| holder == among.me || !among.live.contains(&holder))
    };
    let quota = quota(source_id, open.len(), among).min(among.most);
    let take = open.iter().filter(is_free);
    Share {
        take: take
            .take(quota.saturating_sub(ours.len()))
            .cloned()
            .collect(),
        give_back: ours.iter().skip(quota).map(|l| l.split.clone()).collect(),
        lost,
    }
}

/// The quotas of all consumers together are all splits; who gets one more changes with the source, so that sources of one split
/// are shared as well.
fn quota(source_id: i32, splits: usize, among: Among<'_>) -> usize {
    let consumers = among.live.len().max(1);
    let ordinal = among.live.iter().position(|pid| *pid == among.me);
    let place = (ordinal.unwrap_or(0) + source_id.unsigned_abs() as usize) % consumers;
    splits / consumers + usize::from(place < splits % consumers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leases(text: &str) -> Vec<Lease> {
        text.split_whitespace()
            .enumerate()
            .map(|(at, holder)| Lease {
                split: format!("s{at}"),
                epoch: at as i64,
                holder: holder.parse().ok(),
            })
            .collect()
    }

    /// Takes, gives back.
    fn decided(open: &str, me: i32, live: &[i32], most: usize) -> (usize, usize) {
        let open = leases(open);
        let ours = open.iter().filter(|lease| lease.holder == Some(me));
        let held = ours.map(|lease| (lease.split.clone(), lease.epoch));
        let share = share(4, &open, &held.collect(), Among { me, live, most });
        assert!(share.lost.is_empty());
        (share.take.len(), share.give_back.len())
    }

    #[test]
    fn quotas_are_all_splits() {
        for splits in 0..20 {
            for consumers in 1..6 {
                let live: Vec<i32> = (1..=consumers).collect();
                for source_id in 0..5 {
                    let quota = |me| {
                        let live = &live;
                        quota(source_id, splits, Among { me, live, most: 99 })
                    };
                    assert_eq!(live.iter().map(|me| quota(*me)).sum::<usize>(), splits);
                }
            }
        }
    }

    #[test]
    fn splits_are_taken_and_given_back() {
        // Nobody's, and those of somebody who is gone.
        assert_eq!(decided("- - 9 -", 1, &[1], 99), (4, 0));
        assert_eq!(decided("- - - -", 1, &[1, 2], 99), (2, 0));
        assert_eq!(decided("1 1 1 1", 1, &[1, 2], 99), (0, 2));
        assert_eq!(decided("1 1 1 1", 2, &[1, 2], 99), (0, 0));
        assert_eq!(decided("1 1 2 2", 1, &[1, 2], 99), (0, 0));
        // Few at a time.
        assert_eq!(decided("- - - -", 1, &[1], 3), (3, 0));
        assert_eq!(decided("1 1 1 -", 1, &[1], 3), (0, 0));
        // One that does not live yet takes what is free all the same.
        assert_eq!(decided("- 2", 3, &[2], 99), (1, 0));
    }

    #[test]
    fn what_another_has_by_now_is_lost() {
        let open = leases("1 2");
        let held = HashMap::from([
            ("s0".to_owned(), 0),
            ("s1".to_owned(), 0),
            ("s2".to_owned(), 2),
        ]);
        let among = Among {
            me: 1,
            live: &[1, 2],
            most: 99,
        };
        let mut share = share(4, &open, &held, among);
        share.lost.sort();
        assert_eq!(share.lost, ["s1", "s2"]);
        // What is noted as ours and is not, is free.
        let nothing = HashMap::new();
        let again = super::share(4, &open, &nothing, among);
        assert_eq!(again.take, open[..1]);
    }
}
