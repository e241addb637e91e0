//! CUDA: attention in 16 bits without a matrix of scores, with sums in `f32` (Dao 2023, arXiv:2307.08691).

use burn::backend::DType;
use burn::tensor::Shape;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::Scores;
use super::composed::Sizes;
use super::cube::bounds;
use super::mask::KeyRanges;
use crate::cube::{contiguous, empty};
use crate::cuda::{Numbers, Program, fits, is_aligned};

/// The threads of a warp.
const WARP: usize = 32;
/// The rows of a product of the matrix units.
const ROWS: usize = 16;

/// Queries, keys and values with the mask, as the kernels read them.
pub(super) struct Inputs {
    sizes: Sizes,
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    is_causal: bool,
    starts: Option<CubeTensor>,
    ends: Option<CubeTensor>,
    scores: Scores,
}

impl Inputs {
    /// `None` if the kernels do not support the dtype, the dimension of heads or the device.
    pub(super) fn new(
        q: &CubeTensor,
        k: &CubeTensor,
        v: &CubeTensor,
        mask: &KeyRanges<CubeBackend>,
        scores: Scores,
    ) -> Option<Self> {
        let sizes = Sizes::of::<CubeBackend>(q, k);
        let supports_dim = sizes.dim.is_multiple_of(16) && sizes.dim <= 256;
        let is_16_bits = matches!(q.dtype, DType::BF16 | DType::F16);
        let n_queries = sizes.batch * sizes.seq_q;
        if !is_16_bits || !supports_dim || n_queries == 0 || ![q, k, v].into_iter().all(fits) {
            return None;
        }
        let [q, k, v] = [q, k, v].map(rows_of);
        if ![&q, &k, &v].into_iter().all(|t| is_aligned(t, 0)) {
            return None;
        }
        Some(Self {
            q,
            k,
            v,
            is_causal: mask.causal,
            starts: bounds(mask.starts.clone(), sizes.seq_k),
            ends: bounds(mask.ends.clone(), sizes.seq_k),
            scores,
            sizes,
        })
    }

    fn program(
        &self,
        kernel: &'static str,
        source: &'static str,
        warps: usize,
        of_kernel: &[(&'static str, usize)],
    ) -> Program {
        let mut macros = vec![
            ("HEAD_DIM", self.sizes.dim),
            ("F16", usize::from(self.q.dtype == DType::F16)),
            ("SOFTCAP", usize::from(self.scores.softcap.is_some())),
            ("STARTS", usize::from(self.starts.is_some())),
            ("ENDS", usize::from(self.ends.is_some())),
            ("WARPS", warps),
        ];
        macros.extend_from_slice(of_kernel);
        Program {
            kernel,
            source,
            macros,
            threads: (WARP * warps) as u32,
        }
    }

    /// The bounds; in the place of one that is absent, the queries, which are not read as such.
    fn bounds(&self) -> [&CubeTensor; 2] {
        [&self.starts, &self.ends].map(|bounds| bounds.as_ref().unwrap_or(&self.q))
    }

    fn numbers(&self) -> Numbers {
        let sizes = &self.sizes;
        let numbers = Numbers::new()
            .size(sizes.heads)
            .size(sizes.kv_heads)
            .size(sizes.seq_q)
            .size(sizes.seq_k)
            .size(usize::from(self.is_causal))
            .float(self.scores.scale as f32)
            .float(self.scores.softcap.map_or(1.0, |cap| cap.value() as f32));
        let tensors = [&self.q, &self.k, &self.v].into_iter();
        tensors.fold(numbers, |numbers, tensor| {
            let strides = tensor.meta.strides();
            numbers.size(strides[0]).size(strides[1]).size(strides[2])
        })
    }

    fn of_queries(&self) -> Shape {
        let sizes = &self.sizes;
        Shape::new([sizes.batch, sizes.heads, sizes.seq_q])
    }

    /// The output, and the log-sum-exps.
    pub(super) fn forward(&self) -> (CubeTensor, CubeTensor) {
        let sizes = &self.sizes;
        let y = empty(&self.q, self.q.meta.shape().clone(), self.q.dtype);
        let lse = empty(&self.q, self.of_queries(), DType::F32);
        let (warps, tiles) = match sizes.dim {
            // With two tiles of rows, each load of keys is used twice; few queries are spread.
            ..=64 if sizes.seq_q >= 512 => (4, 2),
            65..=128 if sizes.seq_q >= 512 => (8, 1),
            _ => (4, 1),
        };
        let program = self.program(
            "attention_forward",
            concat!(
                include_str!("cuda/attention.cu"),
                include_str!("cuda/forward.cu")
            ),
            warps,
            &[("ROW_TILES", tiles)],
        );
        let [starts, ends] = self.bounds();
        let reads = [&self.q, &self.k, &self.v, starts, ends];
        let blocks = sizes.seq_q.div_ceil(ROWS * tiles * warps);
        // SAFETY: the kernel checks positions against the sizes, which with the strides are those of the
        // tensors.
        unsafe {
            program.launch(
                [sizes.batch * sizes.heads, blocks, 1],
                &reads,
                &[&y, &lse],
                self.numbers(),
            )
        }
        (y, lse)
    }

    /// The gradients for queries, keys and values.
    pub(super) fn backward(
        &self,
        y: CubeTensor,
        lse: CubeTensor,
        dy: CubeTensor,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        const WARPS: usize = 4;
        let sizes = &self.sizes;
        let [y, lse, dy] = [y, lse, dy].map(contiguous);
        let like = |t: &CubeTensor| empty(t, t.meta.shape().clone(), t.dtype);
        let (dq, dk, dv) = (like(&self.q), like(&self.k), like(&self.v));
        let delta = empty(&self.q, self.of_queries(), DType::F32);
        let [starts, ends] = self.bounds();

        let of_queries = self.program(
            "attention_backward_queries",
            concat!(
                include_str!("cuda/attention.cu"),
                include_str!("cuda/backward_queries.cu")
            ),
            WARPS,
            &[],
        );
        let reads = [&self.q, &self.k, &self.v, starts, ends, &y, &lse, &dy];
        let blocks = sizes.seq_q.div_ceil(ROWS * WARPS);
        // SAFETY: as for the output.
        unsafe {
            of_queries.launch(
                [sizes.batch * sizes.heads, blocks, 1],
                &reads,
                &[&delta, &dq],
                self.numbers(),
            )
        }

        let of_keys = self.program(
            "attention_backward_keys",
            concat!(
                include_str!("cuda/attention.cu"),
                include_str!("cuda/backward_keys.cu")
            ),
            WARPS,
            &[],
        );
        let reads = [&self.q, &self.k, &self.v, starts, ends, &lse, &delta, &dy];
        let blocks = sizes.seq_k.div_ceil(ROWS * WARPS);
        // SAFETY: as for the output; `delta` was written by the kernel before.
        unsafe {
            of_keys.launch(
                [sizes.batch * sizes.kv_heads, blocks, 1],
                &reads,
                &[&dk, &dv],
                self.numbers(),
            )
        }
        (dq, dk, dv)
    }
}

/// The tensor with vectors of heads that are contiguous and aligned.
fn rows_of(tensor: &CubeTensor) -> CubeTensor {
    let strides = tensor.meta.strides();
    let is_aligned = strides[..3]
        .iter()
        .all(|&stride| is_aligned(tensor, stride));
    match strides[3] == 1 && is_aligned {
        true => tensor.clone(),
        false => contiguous(tensor.clone()),
    }
}
