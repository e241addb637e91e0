//! The packed product.

use burn::tensor::{DType, Int, Tensor};
use kernels::{Layout, Levels, Precision, TABLE, dequantize, pack, quant_matmul};

use super::on::{Kind, On, Sum, Uniform, sums, values};

/// Unsorted levels, as in FP4.
const LEVELS: [f32; TABLE] = [
    0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25, -0.1, -0.02, -0.6667, -1.0, -0.3333, -0.5,
    -0.1667, -0.25,
];

/// The bits, the levels, and whether there are zeros.
const CODES: [(usize, Levels, bool); 8] = [
    (2, Levels::Unsigned, true),
    (2, Levels::Centered, false),
    (3, Levels::Unsigned, true),
    (3, Levels::Table(LEVELS), false),
    (4, Levels::Table(LEVELS), false),
    (4, Levels::Unsigned, true),
    (8, Levels::Centered, false),
    (8, Levels::Centered, true),
];

/// The inputs, the outputs, the group size and the rows. A device compiles kernels for each new size.
const SHAPES: [(usize, usize, usize, usize); 9] = [
    // A shorter last group.
    (72, 68, 32, 1),
    // No size divides another, and the tile is incomplete.
    (103, 37, 20, 3),
    // Several tiles, and enough rows for the device's own product.
    (45, 129, 7, 40),
    // One group per column.
    (160, 132, 160, 16),
    // Inputs that are split over cubes, with groups that are aligned to runs and with others.
    (2100, 8, 128, 3),
    (1111, 5, 300, 3),
    // Inputs in whole chunks of one group each, as the matrix units take them.
    (512, 68, 128, 1),
    (256, 36, 32, 5),
    // The same, of so many inputs and so few outputs that several blocks share them.
    (8192, 32, 128, 3),
];

/// How many shapes, the last ones, are there for the kernels of CUDA.
const OF_CUDA: usize = 3;

pub(super) fn conform(on: &On) {
    // A software device takes seconds to compile a kernel, and has the same kernels in half precision.
    let is_software = on.kind == Kind::Cube;
    let step = if is_software && on.dtype != DType::F32 {
        2
    } else {
        1
    };
    let n_shapes = SHAPES.len() - if is_software { OF_CUDA } else { 0 };
    for (k, (bits, levels, zeros)) in CODES.into_iter().enumerate().step_by(step) {
        let shapes = SHAPES.into_iter().take(n_shapes).enumerate();
        for (n, (d_in, d_out, group_size, rows)) in shapes {
            let layout = Layout::new(d_in, d_out, bits, group_size, levels);
            let case = Case::new(on, layout, zeros, rows, (10 * k + n) as u64);
            let of_grids = match on.dtype {
                DType::F32 => vec![DType::F32],
                // Values that are rounded to `BF16` are exact in `F16` too.
                DType::BF16 => vec![DType::BF16, DType::F16, DType::F32],
                dtype => vec![dtype, DType::F32],
            };
            for of_grid in of_grids {
                on.case("the packed product", || case.check(on, of_grid));
            }
        }
    }
}

/// A weight with inputs and the gradient of its outputs, rounded to the dtype.
struct Case {
    layout: Layout,
    rows: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Option<Vec<f32>>,
    x: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(on: &On, layout: Layout, zeros: bool, rows: usize, seed: u64) -> Self {
        let mut uniform = Uniform::new(seed);
        let (d_in, d_out, levels) = (layout.d_in(), layout.d_out(), 1 << layout.bits());
        let codes = uniform.vec(d_in * d_out, 0.0, levels as f32);
        let n_grid = layout.n_groups() * d_out;
        let scales = uniform.vec(n_grid, 0.01, 0.1);
        let zeros = zeros.then(|| {
            let half = (levels / 2) as f32;
            let low = if layout.levels() == Levels::Centered {
                -half
            } else {
                0.0
            };
            on.rounded(uniform.vec(n_grid, low, low + 2.0 * half))
        });
        Self {
            layout,
            rows,
            codes: codes.into_iter().map(|code| code as u8).collect(),
            scales: on.rounded(scales),
            zeros,
            x: on.rounded(uniform.vec(rows * d_in, -1.0, 1.0)),
            dy: on.rounded(uniform.vec(rows * d_out, -1.0, 1.0)),
        }
    }

    fn name(&self) -> String {
        let levels = match self.layout.levels() {
            Levels::Unsigned => "unsigned",
            Levels::Centered => "centered",
            Levels::Table(_) => "table",
        };
        format!(
            "{} bits, {levels}, zeros: {}, {} x {} in groups of {}, {} rows",
            self.layout.bits(),
            self.zeros.is_some(),
            self.layout.d_in(),
            self.layout.d_out(),
            self.layout.group_size(),
            self.rows
        )
    }

    fn on_grid(&self, values: &[f32], i: usize, o: usize) -> f64 {
        f64::from(values[i / self.layout.group_size() * self.layout.d_out() + o])
    }

    /// The level less the zero.
    fn offset(&self, i: usize, o: usize) -> f64 {
        let zero = self.zeros.as_ref().map_or(0.0, |z| self.on_grid(z, i, o));
        f64::from(self.layout.level(self.codes[i * self.layout.d_out() + o])) - zero
    }

    fn weight(&self, i: usize, o: usize) -> f64 {
        self.offset(i, o) * self.on_grid(&self.scales, i, o)
    }

    fn words(&self, on: &On) -> Tensor<3, Int> {
        on.words(pack(&self.codes, &self.layout), self.layout.words_shape())
    }

    /// Checks the operations with a grid of a dtype.
    fn check(&self, on: &On, of_grid: DType) {
        let (layout, rows) = (self.layout, self.rows);
        let name = format!("{}, grid in {of_grid:?}", self.name());
        let (d_in, d_out) = (layout.d_in(), layout.d_out());
        let grid = |values: &[f32]| on.tensor(values, layout.grid_shape()).cast(of_grid);
        let words = self.words(on);

        let w = dequantize(
            words.clone(),
            grid(&self.scales),
            self.zeros.as_deref().map(grid),
            layout,
        );
        if of_grid == on.dtype {
            self.check_rounding(on, &w, &name);
        }
        let weights = sums([d_in, d_out], 1, |i, o, _| self.weight(i, o));
        on.assert_near(&format!("w, {name}"), w, &weights, on.bound());

        // A transposed view: operations must not rely on the order of memory.
        let transposed = |values: &[f32], width: usize| {
            let turned: Vec<f32> = (0..rows * width)
                .map(|at| values[at % rows * width + at / rows])
                .collect();
            on.tensor(&turned, [width, rows])
        };
        let x = transposed(&self.x, d_in).autodiff().require_grad();
        let scales = grid(&self.scales).autodiff().require_grad();
        let zeros = self.zeros.as_deref().map(grid);
        let zeros = zeros.map(|zeros| zeros.autodiff().require_grad());
        let y = quant_matmul(
            x.clone().transpose(),
            words,
            scales.clone(),
            zeros.clone(),
            layout,
            Precision::Full,
        );
        let few = rows <= 16;
        let bound = if few { on.bound() } else { on.product_bound() };
        let at = |r: usize, i: usize| f64::from(self.x[r * d_in + i]);
        let dy_at = |r: usize, o: usize| f64::from(self.dy[r * d_out + o]);
        let expected = sums([rows, d_out], d_in, |r, o, i| at(r, i) * self.weight(i, o));
        on.assert_near(&format!("y, {name}"), y.clone().inner(), &expected, bound);

        let dy = transposed(&self.dy, d_out).transpose().autodiff();
        let grads = (y * dy).sum().backward();
        let bound = on.product_bound();
        let dx = x.grad(&grads).unwrap().transpose();
        let expected = sums([rows, d_in], d_out, |r, i, o| {
            dy_at(r, o) * self.weight(i, o)
        });
        on.assert_near(&format!("dx, {name}"), dx, &expected, bound);

        let size = layout.group_size();
        let over_group = |term: &dyn Fn(usize, usize) -> f64| -> Vec<Sum> {
            sums(layout.grid_shape(), size * rows, |g, o, k| {
                let (i, r) = (g * size + k / rows, k % rows);
                let product = || at(r, i) * dy_at(r, o) * term(i, o);
                if i < d_in { product() } else { 0.0 }
            })
        };
        let expected = over_group(&|i, o| self.offset(i, o));
        let dscales = scales.grad(&grads).unwrap();
        on.assert_near(&format!("dscales, {name}"), dscales, &expected, bound);
        if let Some(zeros) = zeros {
            let expected = over_group(&|i, o| -self.on_grid(&self.scales, i, o));
            let dzeros = zeros.grad(&grads).unwrap();
            on.assert_near(&format!("dzeros, {name}"), dzeros, &expected, bound);
        }
    }

    /// Asserts that the kernels run: they compute in `f32` with any dtype and round once.
    ///
    /// The composed operations round each step, which changes the results in half precision.
    fn check_rounding(&self, on: &On, w: &Tensor<2>, name: &str) {
        if on.dtype == DType::F32 || on.kind == Kind::Host {
            return;
        }
        let found = values(w.clone());
        let d_out = self.layout.d_out();
        let weight = |at: usize| {
            let (i, o) = (at / d_out, at % d_out);
            self.offset(i, o) as f32 * self.on_grid(&self.scales, i, o) as f32
        };
        let expected = on.rounded((0..found.len()).map(weight).collect());
        assert!(found == expected, "{name}: {:?} rounded once", on.dtype);
    }
}
