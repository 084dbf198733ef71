//! Limits, memory, cancelling and errors.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use rakam_engine::{EngineContext, EngineError, Expr, execute};

use crate::fixture::{MemoryBroker, N, Rng, Tiers, all_types, context, plan, rows};

async fn error(tiers: Tiers, ctx: &EngineContext) -> EngineError {
    let input = tiers.input(&all_types(), plan(&[N, 25], None, None));
    let stream = execute(input, Arc::new(tiers.broker), ctx).unwrap();
    stream.try_collect::<Vec<_>>().await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_ends_the_scan() {
    let schema = all_types();
    let mut rng = Rng(1);
    let rows = rows(&schema, 3_000, &mut rng);
    let mut tiers = Tiers::default();
    for piece in rows.chunks(100) {
        tiers.chunk(&schema, piece);
    }
    tiers.file(&schema, &rows, true).await;
    for limit in [0, 1, 99, 250, 10_000] {
        let (found, stream) = tiers
            .scan(&schema, plan(&[N], None, Some(limit)), &context())
            .await;
        assert_eq!(found.len() as u64, limit.min(6_000));
        if limit < 100 {
            assert!(stream.metrics().chunks_read < 30, "{:?}", stream.metrics());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn dropping_the_stream_ends_the_work() {
    let schema = all_types();
    let mut rng = Rng(2);
    let rows = rows(&schema, 200, &mut rng);
    let mut tiers = Tiers::default();
    for piece in rows.chunks(2) {
        tiers.chunk(&schema, piece);
    }
    tiers.broker.delay = Duration::from_millis(20);
    let ctx = EngineContext::new(8, 64 << 20).unwrap();
    let input = tiers.input(&schema, plan(&[N], None, None));
    let broker = Arc::new(tiers.broker);
    let before = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    let mut stream = execute(input, Arc::clone(&broker) as _, &ctx).unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let dropped = Instant::now();
    while tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
        > before
    {
        assert!(dropped.elapsed() < Duration::from_secs(30), "tasks go on");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let asked = broker.asked.load(Ordering::SeqCst);
    assert!(asked < 50, "{asked} chunks were asked for");
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(broker.asked.load(Ordering::SeqCst), asked);
    assert!(broker.busiest.load(Ordering::SeqCst) <= 4);
    assert_eq!(ctx.memory_used(), 0);
    assert_eq!(Arc::strong_count(&broker), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_beyond_the_limit_is_a_clean_error() {
    let schema = all_types();
    let rows = rows(&schema, 2_000, &mut Rng(3));
    for tier in 0..3 {
        let mut tiers = Tiers::default();
        match tier {
            0 => tiers.file(&schema, &rows, true).await,
            1 => tiers.chunk(&schema, &rows),
            _ => tiers.tail(&schema, &rows),
        }
        let ctx = EngineContext::new(2, 1_000).unwrap();
        let error = error(tiers, &ctx).await;
        assert_eq!(error, EngineError::OutOfMemory, "tier {tier}");
        assert_eq!(error.sqlstate(), "53200");
        assert!(error.hint().unwrap().contains("rakam.memory_limit"));
        assert_eq!(ctx.memory_used(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_or_broken_is_said_without_its_place() {
    let schema = all_types();
    let rows = rows(&schema, 300, &mut Rng(4));
    for footer in [true, false] {
        let mut tiers = Tiers::default();
        tiers.file(&schema, &rows, footer).await;
        let path = Path::from(tiers.files[0].path.as_str());
        tiers.store.delete(&path).await.unwrap();
        let missing = error(tiers, &context()).await;
        assert_eq!(missing.sqlstate(), "58P01", "{missing:?}");
        assert!(!missing.message().contains("secret"));

        let mut tiers = Tiers::default();
        tiers.file(&schema, &rows, footer).await;
        let junk = vec![7; tiers.files[0].bytes as usize];
        tiers.store.put(&path, junk.into()).await.unwrap();
        let corrupt = error(tiers, &context()).await;
        assert_eq!(corrupt.sqlstate(), "XX001", "{corrupt:?}");
        assert!(!corrupt.message().contains("secret"));
    }
    let mut tiers = Tiers::default();
    tiers.chunk(&schema, &rows);
    tiers.broker.chunks.insert(100, Bytes::from_static(b"junk"));
    assert_eq!(error(tiers, &context()).await.sqlstate(), "XX001");
    let mut tiers = Tiers::default();
    tiers.chunk(&schema, &rows);
    tiers.broker = MemoryBroker::default();
    assert_eq!(error(tiers, &context()).await.message(), "no such chunk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_read_leave_the_footer_in_the_manifest() {
    let schema = all_types();
    let rows = rows(&schema, 2_000, &mut Rng(5));
    let mut with = Tiers::default();
    with.file(&schema, &rows, true).await;
    let mut without = Tiers::default();
    without.file(&schema, &rows, false).await;
    let bytes = async |tiers: &Tiers| {
        let (_, stream) = tiers
            .scan(&schema, plan(&[N], None, None), &context())
            .await;
        stream.metrics().bytes_read
    };
    let (with, without) = (bytes(&with).await, bytes(&without).await);
    assert!(with > 0 && with < without / 2, "{with} and {without}");
}

/// The longest pattern the IR lets through becomes a regular expression that can be built.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_pattern_works() {
    let schema = all_types();
    let rows = rows(&schema, 50, &mut Rng(6));
    let mut tiers = Tiers::default();
    tiers.chunk(&schema, &rows);
    for unit in ["_", "%_", "€%"] {
        let most = rakam_engine::ir::LIKE_PATTERN_BYTES_MAX / unit.len();
        let filter = Expr::Like {
            expr: Box::new(Expr::Column(25)),
            pattern: unit.repeat(most),
            negated: false,
        };
        assert!(filter.fits());
        let (found, _) = tiers
            .scan(&schema, plan(&[N], Some(filter), None), &context())
            .await;
        assert!(found.is_empty());
    }
}
