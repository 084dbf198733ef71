//! Random filters over all types: the engine and the naive evaluator pick the same rows.

use rakam_engine::{CmpOp, Expr};
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use crate::fixture::{
    N, Rng, Row, Tiers, all_types, context, field, numbers, numeric, plan, rows, value,
};
use crate::naive;

fn column(id: i32) -> Box<Expr> {
    Box::new(Expr::Column(id))
}

fn cmp(op: CmpOp, left: Expr, right: Expr) -> Expr {
    Expr::Cmp {
        op,
        left: Box::new(left),
        right: Box::new(right),
    }
}

const OPS: [CmpOp; 6] = [
    CmpOp::Eq,
    CmpOp::Ne,
    CmpOp::Lt,
    CmpOp::Le,
    CmpOp::Gt,
    CmpOp::Ge,
];

fn comparable(ty: FieldType) -> bool {
    !matches!(
        ty,
        FieldType::Inet
            | FieldType::Jsonb
            | FieldType::BoolArray
            | FieldType::Float8Array
            | FieldType::TextArray
    )
}

/// A literal of a type that can be compared with `ty`, now and then one no row can have.
fn literal(ty: FieldType, rng: &mut Rng) -> Expr {
    if rng.below(12) == 0 {
        return Expr::Null(ty);
    }
    let rare = rng.below(4) == 0;
    Expr::Literal(match ty {
        FieldType::Float4 if rare => Scalar::Float4(rng.pick(&[f32::NAN, -f32::NAN])),
        FieldType::Float8 if rare => Scalar::Float8(rng.pick(&[f64::NAN, -f64::NAN])),
        FieldType::Int4 if rare => value(FieldType::Int8, rng),
        FieldType::Int8 if rare => value(FieldType::Int4, rng),
        FieldType::Numeric { .. } if rare => {
            let other = rng.pick(&[
                numeric(38, 0),
                numeric(38, 38),
                numeric(5, 3),
                numeric(20, 12),
            ]);
            value(other, rng)
        }
        FieldType::Numeric { .. } if rng.below(8) == 0 => Scalar::Numeric {
            unscaled: rng.pick(&[1, -1, 0, i128::MIN, i128::MAX]),
            scale: rng.pick(&[0, 38, 39, 255]),
        },
        FieldType::Date if rare => Scalar::Date(rng.pick(&[i32::MIN, i32::MAX])),
        FieldType::Timestamptz if rare => Scalar::Timestamptz(rng.pick(&[i64::MIN, i64::MAX])),
        ty => value(ty, rng),
    })
}

fn pattern(rng: &mut Rng) -> String {
    let parts = [
        "%", "_", "a", "b", "\\%", "\\_", "\\\\", "ä", "😀", "\n", "%", "\\a", "Z", "l",
    ];
    (0..rng.below(5)).map(|_| rng.pick(&parts)).collect()
}

fn random(schema: &Schema, rng: &mut Rng, depth: usize) -> Expr {
    if depth > 0 && rng.below(2) == 0 {
        let list = |rng: &mut Rng| {
            let n = rng.below(4);
            (0..n).map(|_| random(schema, rng, depth - 1)).collect()
        };
        return match rng.below(6) {
            0 | 1 => Expr::And(list(rng)),
            2 | 3 => Expr::Or(list(rng)),
            4 => Expr::Not(Box::new(random(schema, rng, depth - 1))),
            _ => Expr::Is {
                expr: Box::new(random(schema, rng, depth - 1)),
                value: rng.pick(&[None, Some(true), Some(false)]),
                negated: rng.below(2) == 0,
            },
        };
    }
    let user: Vec<_> = schema.fields.iter().filter(|f| f.id >= N).collect();
    let field = rng.pick(&user);
    match rng.below(10) {
        0 => Expr::IsNull(column(field.id)),
        1 => Expr::IsNotNull(column(field.id)),
        _ if !comparable(field.ty) => Expr::IsNull(column(field.id)),
        2 if field.ty == FieldType::Bool => Expr::Column(field.id),
        2..=4 if field.ty == FieldType::Text => Expr::Like {
            expr: column(field.id),
            pattern: pattern(rng),
            negated: rng.below(2) == 0,
        },
        5 => Expr::InList {
            expr: column(field.id),
            list: (0..rng.below(30)).map(|_| literal(field.ty, rng)).collect(),
            negated: rng.below(2) == 0,
        },
        6 => {
            let same: Vec<_> = user
                .iter()
                .filter(|f| match (f.ty, field.ty) {
                    (FieldType::Numeric { .. }, FieldType::Numeric { .. })
                    | (FieldType::Int4 | FieldType::Int8, FieldType::Int4 | FieldType::Int8) => {
                        true
                    }
                    (a, b) => a == b,
                })
                .collect();
            let other = rng.pick(&same);
            cmp(
                rng.pick(&OPS),
                Expr::Column(field.id),
                Expr::Column(other.id),
            )
        }
        7 => cmp(
            rng.pick(&OPS),
            literal(field.ty, rng),
            Expr::Column(field.id),
        ),
        _ => cmp(
            rng.pick(&OPS),
            Expr::Column(field.id),
            literal(field.ty, rng),
        ),
    }
}

async fn check(seed: u64, filters: usize) {
    let mut rng = Rng(seed);
    let schema = all_types();
    let mut rows = rows(&schema, 1_500, &mut rng);
    // Sorted by a random field, so that row groups and pages have narrow bounds and pruning has work.
    let by = schema.fields.len() - 1 - rng.below(19);
    rows.sort_by_key(|row| format!("{:?}", row[by]));
    let tiers = Tiers::split(&schema, &rows, &mut rng).await;
    let ctx = context();
    let index = schema.fields.iter().position(|f| f.id == N).unwrap();
    let mut pruned = 0;
    for i in 0..filters {
        let filter = random(&schema, &mut rng, 3);
        let expected: Vec<_> = rows
            .iter()
            .filter(|row| naive::matches(&filter, &schema, row))
            .map(|row| vec![row[index].clone()])
            .collect();
        // Wide scans test the filter while Parquet decodes.
        let columns: Vec<i32> = if rng.below(2) == 0 {
            vec![N]
        } else {
            (N..N + 12).collect()
        };
        let (found, stream) = tiers
            .scan(&schema, plan(&columns, Some(filter.clone()), None), &ctx)
            .await;
        assert_eq!(
            numbers(&found),
            numbers(&expected),
            "seed {seed}, filter {i}, sorted by {}: {filter:?}",
            schema.fields[by].name
        );
        let metrics = stream.metrics();
        assert_eq!(metrics.rows_out, expected.len() as u64);
        pruned += metrics.row_groups_pruned_by_stats
            + metrics.row_groups_pruned_by_bloom
            + metrics.pages_pruned;
    }
    assert!(pruned > 0, "nothing was ever pruned");
    assert_eq!(ctx.memory_used(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_filters_agree_with_the_naive_evaluator() {
    let seeds = std::env::var("RAKAM_TEST_SEEDS").map_or(4, |v| v.parse().unwrap());
    for seed in 0..seeds {
        check(seed, 150).await;
    }
}

/// Every operator between each value and each literal of a type: ±0, NaN, infinities, numerics between two steps of
/// the column's scale and beyond its range, integers of the other width.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operator_on_every_kind_of_literal() {
    let ctx = context();
    let types = all_types();
    for ty in types.fields.iter().filter(|f| f.id > N).map(|f| f.ty) {
        if !comparable(ty) {
            continue;
        }
        let mut rng = Rng(9);
        let schema = Schema::new(
            1,
            vec![
                field(N, "n", FieldType::Int8, 1, true),
                field(17, "v", ty, 1, true),
            ],
        );
        let mut values: Vec<_> = (0..60).map(|_| value(ty, &mut rng)).collect();
        values.sort_by_key(|v| format!("{v:?}"));
        values.dedup_by_key(|v| format!("{v:?}"));
        let values = values.into_iter().map(Some).chain([None]);
        let rows: Vec<Row> = values
            .enumerate()
            .map(|(i, v)| {
                let mut row = vec![None; 10];
                row[0] = Some(Scalar::Timestamptz(0));
                row.extend([Some(Scalar::Int8(i as i64)), v]);
                row
            })
            .collect();
        let mut tiers = Tiers::default();
        let third = rows.len() / 3;
        tiers.file(&schema, &rows[..third], true).await;
        tiers.file(&schema, &rows[third..2 * third], false).await;
        tiers.chunk(&schema, &rows[2 * third..]);
        let mut literals: Vec<_> = (0..300).map(|_| literal(ty, &mut rng)).collect();
        // By their bits: -NaN is another literal than NaN.
        literals.sort_by_key(|l| serde_json::to_string(l).unwrap());
        literals.dedup_by_key(|l| serde_json::to_string(l).unwrap());
        for literal in &literals {
            let filters = OPS
                .iter()
                .map(|op| cmp(*op, Expr::Column(17), literal.clone()));
            for filter in filters.chain([Expr::InList {
                expr: column(17),
                list: vec![literal.clone()],
                negated: true,
            }]) {
                let expected: Vec<_> = rows
                    .iter()
                    .filter(|row| naive::matches(&filter, &schema, row))
                    .map(|row| vec![row[10].clone()])
                    .collect();
                let plan = plan(&[N], Some(filter.clone()), None);
                let (found, _) = tiers.scan(&schema, plan, &ctx).await;
                assert_eq!(numbers(&found), numbers(&expected), "{ty}: {filter:?}");
            }
        }
    }
}
