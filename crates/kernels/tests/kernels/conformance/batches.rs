//! Operations on several texts, and on views: the products have operands in batches, with strides, and
//! sizes that fill the tiles of a device's product or leave some of them incomplete.

use burn::tensor::{Int, Tensor};
use kernels::{Mask, add_low_rank, attention, linear_cross_entropy, matmul};

use super::on::{Kind, On};
use super::step::{Case, check};

pub(super) fn conform(on: &On) {
    let cases: [Case; 15] = [
        // Sizes that fill the tiles of a product and leave others incomplete, and rows that are not
        // aligned to loads of 16 bytes.
        (
            "matmul over several tiles",
            &[[1, 1, 200, 160], [1, 1, 160, 264]],
            |t| product(t),
        ),
        (
            "matmul of rows that are not aligned",
            &[[1, 1, 131, 45], [1, 1, 45, 75]],
            |t| product(t),
        ),
        (
            "matmul to few columns over many inputs",
            &[[1, 1, 70, 1500], [1, 1, 1500, 4]],
            |t| product(t),
        ),
        (
            "matmul of few rows",
            &[[1, 1, 3, 640], [1, 1, 640, 136]],
            |t| product(t),
        ),
        (
            "matmul with a transposed weight",
            &[[1, 1, 72, 130], [1, 1, 144, 130]],
            |t| {
                let weight = t[1].clone().reshape([144, 130]).transpose();
                matmul(t[0].clone(), weight)
            },
        ),
        (
            "attention of several texts",
            &[[3, 64, 2, 32], [3, 64, 2, 32], [3, 64, 2, 32]],
            |t| causal(t[0].clone(), t[1].clone(), t[2].clone()),
        ),
        (
            "attention of grouped queries",
            &[[3, 40, 6, 16], [3, 45, 2, 16], [3, 45, 2, 16]],
            |t| causal(t[0].clone(), t[1].clone(), t[2].clone()),
        ),
        (
            "attention of the parts of one projection",
            &[[3, 33, 8, 16]],
            |t| {
                let heads = |from: usize, to| t[0].clone().narrow(2, from, to);
                causal(heads(0, 4), heads(4, 2), heads(6, 2))
            },
        ),
        (
            "attention of heads that are stored one after another",
            &[[3, 4, 33, 16], [3, 2, 33, 16], [3, 2, 33, 16]],
            |t| {
                let [q, k, v] = [0, 1, 2].map(|at: usize| t[at].clone().swap_dims(1, 2));
                causal(q, k, v)
            },
        ),
        (
            "attention to one text",
            &[[3, 7, 4, 16], [1, 9, 4, 16], [1, 9, 4, 16]],
            |t| {
                let [k, v] = [1, 2].map(|at: usize| t[at].clone().expand([3, 9, 4, 16]));
                causal(t[0].clone(), k, v)
            },
        ),
        (
            "attention of grouped queries to fewer keys",
            &[[3, 45, 6, 16], [3, 40, 2, 16], [3, 40, 2, 16]],
            |t| {
                let [q, k, v] = [0, 1, 2].map(|at: usize| t[at].clone());
                attention(q, k, v, Mask::full(), 0.25)
            },
        ),
        // More rows than a slab of logits has, on every device.
        (
            "the loss over several slabs",
            &[[1, 2, 530, 8], [1, 1, 8, 4200]],
            |t| loss(t[0].clone(), t[1].clone().reshape([8, 4200])),
        ),
        (
            "the loss of the first tokens of each text, with a tied head",
            &[[3, 60, 1, 24], [1, 1, 300, 24]],
            |t| {
                let head = t[1].clone().reshape([300, 24]).transpose();
                loss(t[0].clone().narrow(1, 0, 59), head)
            },
        ),
        (
            "low-rank factors beside a weight",
            &[
                [1, 2, 70, 96],
                [1, 1, 96, 16],
                [1, 1, 16, 80],
                [1, 1, 96, 80],
            ],
            |t| beside_weight(t, [96, 16, 80]),
        ),
        (
            "low-rank factors added to a weight",
            &[[1, 1, 96, 80], [1, 1, 96, 4], [1, 1, 80, 4]],
            |t| {
                let b = t[2].clone().reshape([80, 4]).transpose();
                let a = t[1].clone().reshape([96, 4]);
                add_low_rank(t[0].clone().reshape([96, 80]), a, b).reshape([1, 1, 96, 80])
            },
        ),
    ];
    check(on, &cases);
    // The sizes of a training step, which would take a software device minutes.
    if on.kind != Kind::Cube {
        let cases: [Case; 6] = [
            (
                "attention of many queries",
                &[[1, 520, 2, 64], [1, 520, 1, 64], [1, 520, 1, 64]],
                |t| causal(t[0].clone(), t[1].clone(), t[2].clone()),
            ),
            (
                "attention of wide heads",
                &[[1, 520, 2, 128], [1, 520, 1, 128], [1, 520, 1, 128]],
                |t| causal(t[0].clone(), t[1].clone(), t[2].clone()),
            ),
            (
                "attention of the widest heads",
                &[[1, 70, 2, 256], [1, 70, 1, 256], [1, 70, 1, 256]],
                |t| causal(t[0].clone(), t[1].clone(), t[2].clone()),
            ),
            (
                "attention in a training step",
                &[[4, 256, 12, 64], [4, 256, 12, 64], [4, 256, 12, 64]],
                |t| causal(t[0].clone(), t[1].clone(), t[2].clone()),
            ),
            (
                "low-rank factors in a training step",
                &[
                    [1, 4, 256, 768],
                    [1, 1, 768, 16],
                    [1, 1, 16, 768],
                    [1, 1, 768, 768],
                ],
                |t| beside_weight(t, [768, 16, 768]),
            ),
            (
                "the loss in a training step",
                &[[1, 4, 255, 64], [1, 1, 32_000, 64]],
                |t| loss(t[0].clone(), t[1].clone().reshape([32_000, 64]).transpose()),
            ),
        ];
        check(on, &cases);
    }
}

fn product(t: &[Tensor<4>]) -> Tensor<4> {
    let [_, _, d_in, d_out] = t[1].dims();
    matmul(t[0].clone(), t[1].clone().reshape([d_in, d_out]))
}

fn causal(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    attention(q, k, v, Mask::causal(), 0.25)
}

/// `x w + (x a) b / 2` with `[d_in, rank, d_out]`; the rows of `x` are of several texts.
fn beside_weight(t: &[Tensor<4>], [d_in, rank, d_out]: [usize; 3]) -> Tensor<4> {
    let [_, batch, seq, _] = t[0].dims();
    let matrix = |at: usize, shape: [usize; 2]| t[at].clone().reshape(shape);
    let x = matrix(0, [batch * seq, d_in]);
    let low = matmul(x.clone(), matrix(1, [d_in, rank])) * 0.5;
    let y = matmul(x, matrix(3, [d_in, d_out])) + matmul(low, matrix(2, [rank, d_out]));
    y.reshape([1, batch, seq, d_out])
}

/// The loss of each row of `x`, `[1, 1, 1, rows]`.
fn loss(x: Tensor<4>, head: Tensor<2>) -> Tensor<4> {
    let [batch, seq, parts, hidden] = x.dims();
    let (rows, [_, vocab]) = (batch * seq * parts, head.dims());
    let targets = Tensor::<1, Int>::arange(0..rows as i64, &x.device().inner()) * 37 % vocab as i64;
    linear_cross_entropy(x.reshape([rows, hidden]), head, targets).reshape([1, 1, 1, rows])
}
