//! The same rows in any split over the tiers are the same table.

use std::ops::Range;
use std::sync::Arc;

use object_store::local::LocalFileSystem;
use rakam_engine::ir::Transactions;
use rakam_engine::rows::{ROW_FIELD_ID, row};
use rakam_engine::{CmpOp, Expr, FileRef};
use rakam_lake::period::Period;
use rakam_lake::rows::RowBits;
use rakam_lake::scalar::Scalar;
use rakam_lake::write::{FileOptions, FileWriter};

use crate::fixture::{N, ORIGIN, Rng, Tiers, all_types, batch, context, numbers, plan, rows};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_split_reads_back_what_went_in() {
    let schema = all_types();
    let ctx = context();
    let ids: Vec<i32> = schema.fields.iter().map(|f| f.id).collect();
    for seed in 0..6 {
        let mut rng = Rng(seed);
        let mut expected = rows(&schema, 1_000, &mut rng);
        let tiers = Tiers::split(&schema, &expected, &mut rng).await;
        let (mut found, stream) = tiers.scan(&schema, plan(&ids, None, None), &ctx).await;
        let key = |row: &Vec<Option<Scalar>>| format!("{:?}", row[10]);
        found.sort_by_key(key);
        expected.sort_by_key(key);
        // Debug text tells -0 from 0, which equality does not.
        assert_eq!(format!("{found:?}"), format!("{expected:?}"), "seed {seed}");
        let metrics = stream.metrics();
        assert_eq!(metrics.files_opened, tiers.files.len() as u64);
        assert_eq!(metrics.chunks_read, tiers.chunks.len() as u64);
        assert_eq!(metrics.rows_out, 1_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn columns_come_in_the_plans_order_even_twice() {
    let schema = all_types();
    let mut rng = Rng(3);
    let rows = rows(&schema, 500, &mut rng);
    let tiers = Tiers::split(&schema, &rows, &mut rng).await;
    let (found, _) = tiers
        .scan(&schema, plan(&[N, 2, N, 1], None, None), &context())
        .await;
    assert_eq!(found.len(), 500);
    for row in found {
        assert_eq!(row[0], row[2]);
        let Some(Scalar::Int8(n)) = row[0] else {
            panic!()
        };
        assert_eq!(row[1], Some(Scalar::Text(format!("u{}", n % 7))));
        assert_eq!(row[3], Some(Scalar::Timestamptz(1_700_000_000_000_000 + n)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_counted_without_columns() {
    let schema = all_types();
    let mut rng = Rng(4);
    let rows = rows(&schema, 900, &mut rng);
    let tiers = Tiers::split(&schema, &rows, &mut rng).await;
    let (found, _) = tiers.scan(&schema, plan(&[], None, None), &context()).await;
    assert_eq!(found.len(), 900);
    let filter = Expr::Cmp {
        op: CmpOp::Lt,
        left: Box::new(Expr::Column(N)),
        right: Box::new(Expr::Literal(Scalar::Int8(123))),
    };
    let (found, _) = tiers
        .scan(&schema, plan(&[], Some(filter.clone()), None), &context())
        .await;
    assert_eq!(found.len(), 123);
    let (found, _) = tiers
        .scan(&schema, plan(&[], Some(filter), Some(7)), &context())
        .await;
    assert_eq!(found.len(), 7);
}

/// A scan by row tells which row of which object each is, and a set made of that deletes exactly those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_found_by_number_are_the_rows_deleted() {
    let schema = all_types();
    for seed in 0..8 {
        let mut rng = Rng(seed);
        let rows = rows(&schema, 1_200, &mut rng);
        let mut tiers = Tiers::split(&schema, &rows, &mut rng).await;
        tiers.broker.tail.lock().unwrap().clear();
        let (before, _) = tiers
            .scan(&schema, plan(&[N], None, None), &context())
            .await;
        let filter = Expr::Cmp {
            op: CmpOp::Lt,
            left: Box::new(Expr::Column(N)),
            right: Box::new(Expr::Literal(Scalar::Int8(rng.below(1_200) as i64))),
        };
        let columns = [N, ROW_FIELD_ID, 10];
        let (found, _) = tiers
            .scan(
                &schema,
                plan(&columns, Some(filter.clone()), None),
                &context(),
            )
            .await;
        for (object, n, deleted) in tiers
            .files
            .iter_mut()
            .map(|f| {
                (
                    f.number,
                    f.footer.is_some().then_some(3_000),
                    &mut f.deleted,
                )
            })
            .chain(
                tiers
                    .chunks
                    .iter_mut()
                    .map(|c| (c.number, Some(c.n), &mut c.deleted)),
            )
        {
            // A file without a footer at hand cannot have deleted rows.
            let Some(n) = n else { continue };
            let mut bits = RowBits::new(n);
            for value in &found {
                let Some(Scalar::Int8(value)) = value[1] else {
                    panic!("no row number");
                };
                let (of, row) = row(value);
                assert!(of != object || bits.insert(row));
            }
            let known = deleted.clone().unwrap_or_default();
            *deleted = Some(Arc::new(known.union(&bits.finish())));
        }
        let without_footer: Vec<u32> = tiers
            .files
            .iter()
            .filter(|f| f.footer.is_none())
            .map(|f| f.number)
            .collect();
        let kept: Vec<i64> = found
            .iter()
            .filter_map(|cells| match (&cells[0], &cells[1]) {
                (Some(Scalar::Int8(n)), Some(Scalar::Int8(value))) => {
                    without_footer.contains(&row(*value).0).then_some(*n)
                }
                _ => None,
            })
            .collect();
        let (left, _) = tiers
            .scan(&schema, plan(&[N], Some(filter), None), &context())
            .await;
        let mut kept = kept;
        kept.sort_unstable();
        assert_eq!(numbers(&left), kept, "seed {seed}");
        let (after, _) = tiers
            .scan(&schema, plan(&[N], None, None), &context())
            .await;
        assert_eq!(after.len(), before.len() - found.len() + kept.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_left_out_by_their_transactions() {
    let schema = all_types();
    let received = ORIGIN.received_at_us;
    // The fixture's rows are all of transaction 700.
    let mut rows = rows(&schema, 600, &mut Rng(8));
    for row in &mut rows {
        row[8] = Some(Scalar::Timestamptz(received));
    }
    let mut tiers = Tiers::default();
    tiers.file(&schema, &rows[..200], true).await;
    tiers.chunk(&schema, &rows[200..400]);
    tiers.tail(&schema, &rows[400..]);
    tiers.row_chunk(&schema, &[r#"{"f0": 600}"#]);
    let of = |xids: Range<i64>, others: &[i64], own_since_us| Transactions {
        xids,
        others: others.to_vec(),
        own_since_us,
    };
    for (transactions, left) in [
        (of(700..701, &[], i64::MIN), 0),
        (of(0..700, &[1, 700], received), 0),
        (of(0..700, &[701], i64::MIN), 601),
        (of(701..900, &[], i64::MIN), 601),
        // They came with such a transaction of another server.
        (of(0..900, &[700], received + 1), 601),
    ] {
        for columns in [&[N][..], &[N, ROW_FIELD_ID]] {
            let mut plan = plan(columns, None, None);
            plan.leave_out_of(&transactions);
            let (found, _) = tiers.scan(&schema, plan, &context()).await;
            assert_eq!(found.len(), left, "{transactions:?}, columns {columns:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_collection_is_an_empty_table() {
    let schema = all_types();
    let (found, _) = Tiers::default()
        .scan(&schema, plan(&[N], None, None), &context())
        .await;
    assert!(found.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_condition_that_is_never_true_opens_nothing() {
    let schema = all_types();
    let mut rng = Rng(5);
    let rows = rows(&schema, 900, &mut rng);
    let tiers = Tiers::split(&schema, &rows, &mut rng).await;
    let filter = Expr::And(vec![
        Expr::IsNotNull(Box::new(Expr::Column(N))),
        Expr::Cmp {
            op: CmpOp::Eq,
            left: Box::new(Expr::Column(N)),
            right: Box::new(Expr::Param {
                index: 0,
                ty: rakam_event::types::FieldType::Int8,
            }),
        },
    ]);
    let bound = plan(&[N], Some(filter.clone()), None)
        .bind(&[None])
        .unwrap();
    let (found, stream) = tiers.scan(&schema, bound, &context()).await;
    assert!(found.is_empty());
    assert_eq!(stream.metrics(), Default::default());
    let bound = plan(&[N], Some(filter), None)
        .bind(&[Some(Scalar::Int8(5))])
        .unwrap();
    let (found, _) = tiers.scan(&schema, bound, &context()).await;
    assert_eq!(numbers(&found), vec![5]);
}

/// A file as the flusher writes it, in a directory, read with the footer of the manifest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_the_lake_is_read_from_its_directory() {
    let schema = all_types();
    let mut rows = rows(&schema, 20_000, &mut Rng(7));
    rows.sort_by_key(|row| match row[0] {
        Some(Scalar::Timestamptz(time)) => time,
        _ => 0,
    });
    let directory = tempfile::tempdir().unwrap();
    let options = FileOptions {
        project: "p".to_owned(),
        project_id: 3,
        collection: "c".to_owned(),
        collection_id: 7,
        flush_id: Default::default(),
        period: Period::Year,
        first_day: 19_358,
        replaces: None,
    };
    let mut writer = FileWriter::new(&schema, &options, Vec::new());
    for part in rows.chunks(7_000) {
        writer.write(&batch(&schema, part)).unwrap();
    }
    let written = writer.finish().unwrap();
    std::fs::write(directory.path().join("a.parquet"), &written.sink).unwrap();
    let mut tiers = Tiers::default();
    tiers.files.push(FileRef {
        store: Arc::new(LocalFileSystem::new_with_prefix(directory.path()).unwrap()),
        path: "a.parquet".to_owned(),
        bytes: written.bytes,
        n: written.n,
        has_extra: written.has_extra,
        footer: Some(written.footer),
        deleted: None,
        number: 0,
        remote: false,
    });
    let ids: Vec<i32> = schema.fields.iter().map(|f| f.id).collect();
    let (mut found, _) = tiers
        .scan(&schema, plan(&ids, None, None), &context())
        .await;
    found.sort_by_key(|row| match row[0] {
        Some(Scalar::Timestamptz(time)) => time,
        _ => 0,
    });
    assert!(format!("{found:?}") == format!("{rows:?}"));

    let absent = Expr::Cmp {
        op: CmpOp::Eq,
        left: Box::new(Expr::Column(2)),
        right: Box::new(Expr::Literal(Scalar::Text("u3x".to_owned()))),
    };
    let (found, stream) = tiers
        .scan(&schema, plan(&[N], Some(absent), None), &context())
        .await;
    assert!(found.is_empty());
    assert_eq!(stream.metrics().row_groups_pruned_by_bloom, 1);

    let late = Expr::Cmp {
        op: CmpOp::Ge,
        left: Box::new(Expr::Column(1)),
        right: Box::new(Expr::Literal(Scalar::Timestamptz(1_700_000_000_019_990))),
    };
    let (found, _) = tiers
        .scan(&schema, plan(&[N], Some(late), None), &context())
        .await;
    assert_eq!(numbers(&found), (19_990..20_000).collect::<Vec<_>>());
}
